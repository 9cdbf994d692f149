//! One module per command. Each takes the context and its arguments, and ends with a failure or not at all.

pub(crate) mod apply;
pub(crate) mod attach;
pub(crate) mod check;
pub(crate) mod delete;
pub(crate) mod exec;
pub(crate) mod hello;
pub(crate) mod image;
pub(crate) mod logs;
pub(crate) mod restart_run;
pub(crate) mod see;
pub(crate) mod system;
pub(crate) mod version;

use std::ffi::OsString;

use clap::error::ErrorKind;

/// Two habits from other tools that this command line does not share.
pub(crate) fn usage_hint(error: &clap::Error, words: impl Iterator<Item = OsString>) -> Option<String> {
    if !matches!(error.kind(), ErrorKind::UnknownArgument | ErrorKind::MissingRequiredArgument) {
        return None;
    }
    let words: Vec<String> = words.skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let command = words.iter().find(|word| ["apply", "plan", "check", "exec"].contains(&word.as_str()))?;
    let unknown = error.get(clap::error::ContextKind::InvalidArg).map(ToString::to_string);
    match (command.as_str(), unknown) {
        ("exec", _) if !words.iter().any(|word| word == "--") => {
            Some("write -- before the command: keel exec POD -- COMMAND".into())
        }
        ("apply" | "plan" | "check", Some(word)) if !word.starts_with('-') => {
            Some(format!("did you mean -f {word}?"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    fn hint(words: &[&str]) -> Option<String> {
        let error = crate::cli::Cli::try_parse_from(words).unwrap_err();
        super::usage_hint(&error, words.iter().map(Into::into))
    }

    #[test]
    fn habits_of_other_tools_are_answered_with_a_hint() {
        assert_eq!(hint(&["keel", "apply", "dir"]).as_deref(), Some("did you mean -f dir?"));
        assert!(hint(&["keel", "exec", "pod", "ls"]).unwrap().contains("--"));
        assert!(hint(&["keel", "exec", "pod"]).unwrap().contains("--"));
        assert_eq!(hint(&["keel", "apply", "--nonsense"]), None);
        assert_eq!(hint(&["keel", "exec", "--nonsense", "--", "ls"]), None);
    }
}
