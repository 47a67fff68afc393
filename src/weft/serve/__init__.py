"""An HTTP server in OpenAI's form for a base and its adapters of any methods."""
