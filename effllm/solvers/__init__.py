"""From a dense weight (and calibration statistics) to the numbers a format stores. One file per algorithm."""
