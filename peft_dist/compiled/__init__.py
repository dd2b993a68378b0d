"""What is compiled where it runs: loops for which no library has a product that is small enough to be cheap."""
