"""The Pyro model of an adapted network, its structured guide, draws and what they predict."""
