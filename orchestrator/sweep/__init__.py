"""A sweep: Ray Tune decides which trials there are and which go on; warm groups of workers train them."""
