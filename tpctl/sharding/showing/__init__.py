"""How a cut looks, as text and as a page."""
