"""The editing methods, each behind the same `Editor`; `methods` names them."""
