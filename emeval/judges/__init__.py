"""One file per judge: ``judges/openai.py`` holds the function ``openai`` that makes it."""
