"""What a run needs and a reader of the algorithm does not."""
