"""Scripts of a checkout; once installed they are the package `resbackbone_tools`. Nothing is imported from here."""
