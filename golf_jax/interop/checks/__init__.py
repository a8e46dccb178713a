"""Cross-framework checks, one function `(Context) -> list[CheckResult]` per reference file; `CHECKS` says which file asks for which."""
