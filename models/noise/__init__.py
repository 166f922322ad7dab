"""How noise is added, what is predicted, and how one samples."""
