"""The page on a machine of one's own on which people choose between answers, and judge blind."""
