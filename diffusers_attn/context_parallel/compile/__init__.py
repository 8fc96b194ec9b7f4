"""Settings and a graph pass of Inductor for compiled exchanges."""
