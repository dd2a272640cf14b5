"""The colours of all figures: Okabe's and Ito's, told apart with any colour vision, and greys."""

__all__ = ["BLACK", "BLUE", "DARK_GREY", "GREEN", "GREY", "ORANGE", "PURPLE", "SKY", "VERMILION"]

BLACK, DARK_GREY, GREY = "#000000", "#555555", "#999999"
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
VERMILION, ORANGE, PURPLE = "#D55E00", "#E69F00", "#CC79A7"
