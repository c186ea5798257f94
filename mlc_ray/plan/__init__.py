"""What a run, a score or a search needs, counted before it is paid for: memory by part, time, and GPU hours.

`shapes` has what a model is made of, `hardware` what it runs on, `lengths` what the data weighs; `memory` and `seconds`
are the formulas (docs/plan.md), `runs` puts them together, `nearest` looks for the cheapest settings that fit, and
`check` is what commands ask before they start. No model is loaded, and nothing is downloaded.
"""
