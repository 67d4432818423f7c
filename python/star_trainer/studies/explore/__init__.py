"""``star-explore``: a local page that samples a prompt and shows where its advantage goes."""

import os

# Read when gradio is imported, which is after this.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
