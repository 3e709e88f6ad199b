"""What a data set gives away before any network is trained: duplicates, leaks, label-pure sources, shortcuts."""
