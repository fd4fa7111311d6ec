"""llm-d's endpoint picker, from its EndpointPickerConfig."""
