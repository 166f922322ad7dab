"""What a run is: every field, its default and its checks. Free of torch."""
