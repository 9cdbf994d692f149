//! YAML out.

use serde::Serialize;
use serde_saphyr::SerializerOptions;

/// YAML in kubectl's style: lists not indented, texts that YAML 1.1 would read otherwise in quotes, several lines as
/// blocks, long lines whole.
pub fn to_yaml<T: Serialize>(value: &T) -> String {
    let mut options = SerializerOptions::default();
    options.folded_wrap_chars = usize::MAX;
    let mut out = String::new();
    match serde_saphyr::to_fmt_writer_with_options(&mut out, value, options) {
        Ok(()) => out,
        // Only keys that are lists or maps cannot be written; JSON, which is YAML too, has none either.
        Err(error) => format!("# cannot be written as YAML: {error}\n"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn texts_that_look_like_something_else_are_quoted() {
        let words = [
            "yes", "on", "y", "1.10", "0755", "0o17", "1_000", "null", "~", "", "<<", "a: b", "# x", " x",
            "*a",
        ];
        for word in words {
            let out = to_yaml(&json!({ "k": word }));
            let tree = crate::tree::Tree::read(&out);
            assert_eq!(tree.text(tree.roots[0], "k"), Some(word), "{out}");
        }
    }

    #[test]
    fn long_and_many_lined_texts_come_back() {
        for text in [
            "word ".repeat(100),
            "a\nb\n".into(),
            "a\nb".into(),
            "\n\n a\n".into(),
            "t\t\u{1f600}\u{7}".into(),
        ] {
            let out = to_yaml(&json!({ "k": text }));
            let tree = crate::tree::Tree::read(&out);
            assert_eq!(tree.text(tree.roots[0], "k"), Some(text.as_str()), "{out}");
        }
        assert_eq!(to_yaml(&json!({"a": [{"b": 1}]})), "a:\n- b: 1\n");
    }
}
