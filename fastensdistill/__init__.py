"""fastensdistill: distil an ensemble of image classifiers into one ordinary network."""
