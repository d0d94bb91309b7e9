"""The documentation: hand-written pages, and the program that writes their generated parts."""
