"""`bench`: measured, modelled, drawn."""
