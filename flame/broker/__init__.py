"""The only package that knows NATS: the seam, its implementation, and a server of our own."""
