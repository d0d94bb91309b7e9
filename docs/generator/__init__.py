"""Write the generated parts of README.md and docs/ (`python -m docs.generator`)."""
