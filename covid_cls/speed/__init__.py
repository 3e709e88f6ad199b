"""What `python -m covid_cls.benchmark` measures."""
