"""The version of this code, in one place: it travels with a saved model, where the package may not be installed."""

PACKAGE_VERSION = "0.2.0"
