"""One adapter as files: PEFT's folder, our manifest, and the guard before both."""
