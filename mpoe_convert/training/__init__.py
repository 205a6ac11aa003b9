"""What is done to a converted model by gradient, and how good it is then."""
