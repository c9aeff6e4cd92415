"""The second version of the functions, which differs from the first in nothing that is here."""
