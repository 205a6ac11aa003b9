"""Forms of a converted model that need no custom code."""
