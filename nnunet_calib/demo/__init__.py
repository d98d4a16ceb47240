"""The whole workflow on data it makes: a data set with truly ambiguous borders, and the stock commands run on it."""
