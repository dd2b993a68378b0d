"""Which version answers to a name: what is measured of each, and how one takes the place of another."""
