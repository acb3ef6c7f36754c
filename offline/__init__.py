"""The offline quantizer: capture → factor → nearest plane → encode → checkpoint."""
