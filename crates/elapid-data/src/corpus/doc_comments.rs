//! Doc comments of Rust sources: the lines after `///` and `//!`, without what rustdoc hides.

/// The doc comments of a source file, one string for each run of consecutive lines.
pub(super) fn extract(source: &str) -> Vec<String> {
    let mut comments = Vec::new();
    let mut comment = String::new();
    let mut in_code = false;
    for line in source.lines().chain([""]) {
        let Some(text) = doc_text(line) else {
            if !comment.trim().is_empty() {
                comments.push(std::mem::take(&mut comment));
            }
            comment.clear();
            in_code = false;
            continue;
        };
        if text.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        let trimmed = text.trim();
        if in_code && (trimmed == "#" || trimmed.starts_with("# ")) {
            continue;
        }
        comment.push_str(text);
        comment.push('\n');
    }
    comments
}

/// The text of a doc comment's line.
fn doc_text(line: &str) -> Option<&str> {
    let line = line.trim();
    let text = line
        .strip_prefix("//!")
        .or_else(|| line.strip_prefix("///").filter(|text| !text.starts_with('/')))?;
    Some(text.strip_prefix(' ').unwrap_or(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_are_taken_apart() {
        let source = "//! The crate.\n//!\n//! More.\nuse std::io;\n    /// An item\n    /// in two lines.\n\
            fn f() {} // no\n//// a ruler\n/// ```\n/// # use hidden::Thing;\n/// #\n/// #[test]\n/// let a = 1;\n/// ```\n";
        assert_eq!(
            extract(source),
            [
                "The crate.\n\nMore.\n",
                "An item\nin two lines.\n",
                "```\n#[test]\nlet a = 1;\n```\n"
            ]
        );
        assert!(extract("fn main() {}\n").is_empty());
        assert!(extract("///\n///   \n").is_empty());
    }
}
