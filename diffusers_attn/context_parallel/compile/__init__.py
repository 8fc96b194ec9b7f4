"""What Inductor needs to compile exchanges, and the order in which it runs them."""
