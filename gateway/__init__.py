"""The gateway agent: ingress -> spool -> delivery, with processing and operation beside the flow."""
