"""How the embedded demo in assets/demo was made."""
