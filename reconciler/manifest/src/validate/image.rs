//! Syntax of image references: `[domain[:port]/]path[:tag][@digest]`.

/// What is wrong, and what would be right when that is plain.
pub(crate) fn reference(image: &str) -> Result<(), (String, Option<String>)> {
    let fail = |message: &str| Err((message.to_owned(), None));
    if image.is_empty() {
        return fail("must not be empty");
    }
    if image.trim() != image {
        return fail("must not have spaces or line ends around it");
    }
    if let Some(c) = image.chars().find(|c| c.is_whitespace() || matches!(c, '$' | '{' | '}')) {
        let help =
            matches!(c, '$' | '{' | '}').then(|| "variables are not replaced in image names".to_owned());
        return Err((format!("an image name must not have \"{c}\""), help));
    }
    if image.contains("://") {
        return Err((
            "an image name has no \"://\"".into(),
            Some("write it without http:// or docker://".into()),
        ));
    }
    let (rest, digest) = match image.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (image, None),
    };
    if let Some(digest) = digest {
        check_digest(digest)?;
    }
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    check_name(name)
}

fn check_digest(digest: &str) -> Result<(), (String, Option<String>)> {
    let length = match digest.split_once(':') {
        Some(("sha256", hex)) => Some((hex, 64)),
        Some(("sha512", hex)) => Some((hex, 128)),
        _ => None,
    };
    match length {
        Some((hex, want))
            if hex.len() == want && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) =>
        {
            Ok(())
        }
        Some((hex, want)) => Err((
            format!(
                "a digest must be {want} lower-case hexadecimal digits, this has {} characters",
                hex.chars().count()
            ),
            None,
        )),
        None => Err(("a digest must start with sha256: or sha512:".into(), None)),
    }
}

fn check_tag(tag: &str) -> Result<(), (String, Option<String>)> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let rest = |c: char| word(c) || c == '.' || c == '-';
    if tag.is_empty() {
        return Err(("the tag after \":\" is empty".into(), None));
    }
    let right = tag.len() <= 128 && tag.starts_with(word) && tag.chars().all(rest);
    if right { Ok(()) } else { Err((format!("\"{tag}\" is not an image tag"), None)) }
}

fn check_name(name: &str) -> Result<(), (String, Option<String>)> {
    let (domain, path) = match name.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (Some(first), rest),
        _ => (None, name),
    };
    if let Some(domain) = domain {
        let (host, port) = domain.split_once(':').unwrap_or((domain, "1"));
        let host_ok =
            !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-'));
        if !host_ok || port.parse::<u16>().is_err() {
            return Err((format!("\"{domain}\" is not a registry's address"), None));
        }
    }
    if path.chars().any(|c| c.is_ascii_uppercase()) {
        let lower = name.replace(path, &path.to_lowercase());
        return Err(("image names are lower case".into(), Some(format!("did you mean \"{lower}\"?"))));
    }
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let part_ok = |part: &str| {
        let bytes = part.as_bytes();
        !bytes.is_empty()
            && alnum(bytes[0])
            && alnum(bytes[bytes.len() - 1])
            && bytes.iter().all(|b| alnum(*b) || matches!(b, b'.' | b'_' | b'-'))
            && !part.contains("..")
    };
    match path.split('/').find(|p| !part_ok(p)) {
        Some("") => Err(("an image name must not have an empty part".into(), None)),
        Some(part) => Err((format!("\"{part}\" is not part of an image name"), None)),
        None => Ok(()),
    }
}
