"""How the tokens of a head group are stored."""
