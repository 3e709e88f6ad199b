"""Run outputs, reports of sweeps, HTML pages, figures and TensorBoard entries."""
