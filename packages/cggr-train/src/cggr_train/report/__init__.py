"""Pictures and pages: learning curves as PNG, the demo's page as one self-contained HTML file."""
