"""The frozen network: which layers are adapted, how they get their updates, what runs once."""
