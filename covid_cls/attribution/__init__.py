"""Attribution maps, lung masks and the metrics of maps."""
