"""SEDONA (Pyeon et al., ICLR 2021): a search for the cuts of a network and the heads of its blocks."""
