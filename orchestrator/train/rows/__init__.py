"""A dataset's rows, from its files to the order in which steps take them."""
