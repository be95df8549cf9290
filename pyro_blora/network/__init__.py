"""The frozen network: which layers are adapted, and how they get their updates."""
