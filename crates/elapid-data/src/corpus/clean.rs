//! Cleaning: keeps prose and code that a person wrote once.
//!
//! Text is cut into blocks: headings, fenced code, and paragraphs between blank lines. Lines of badges, images, link
//! definitions and bare tags go; so do blocks that are licence text, data, or known already. A block is
//! known if its words were seen before, or if three blocks of the same template (its words without code
//! spans, link targets and digits) were: machine-written documentation repeats templates. A heading
//! stays only if something under it does.

use std::collections::HashMap;

use xxhash_rust::xxh3::xxh3_64;

/// Remembers what was seen in all documents so far.
#[derive(Default)]
pub(super) struct Cleaner {
    seen: HashMap<u64, u8>,
}

#[derive(Debug, PartialEq, Eq)]
enum Block {
    Heading { level: usize, text: String },
    Code(String),
    Paragraph(String),
}

const TEMPLATE_LIMIT: u8 = 3;

impl Cleaner {
    /// The cleaned text of one document, at most `room` bytes of whole blocks. A heading of one section
    /// never stands over another section's text.
    pub(super) fn clean(&mut self, sections: &[String], room: usize) -> String {
        let mut text = String::new();
        for section in sections {
            let mut headings: Vec<(usize, String)> = Vec::new();
            for block in blocks(section) {
                let body = match block {
                    Block::Heading { level, text } => {
                        headings.retain(|&(above, _)| above < level);
                        headings.push((level, text));
                        continue;
                    }
                    Block::Code(body) if is_text(&body, 45) && self.is_new(&body, false) => body,
                    Block::Paragraph(body)
                        if is_text(&body, 60) && !is_licence(&body) && self.is_new(&body, true) =>
                    {
                        body
                    }
                    _ => continue,
                };
                let added: usize =
                    headings.iter().map(|(_, heading)| heading.len() + 2).sum::<usize>()
                        + body.len();
                if text.len() + added + 2 > room {
                    return text;
                }
                for part in headings.drain(..).map(|(_, heading)| heading).chain([body]) {
                    if !text.is_empty() {
                        text.push('\n');
                    }
                    text.push_str(&part);
                    text.push('\n');
                }
            }
        }
        text
    }

    fn is_new(&mut self, body: &str, templates: bool) -> bool {
        let words = body.split_whitespace().collect::<Vec<_>>().join(" ");
        if self.count(&words) > 1 {
            return false;
        }
        !templates || self.count(&template(&words)) <= TEMPLATE_LIMIT
    }

    fn count(&mut self, text: &str) -> u8 {
        let count = self.seen.entry(xxh3_64(text.as_bytes())).or_default();
        *count = count.saturating_add(1);
        *count
    }
}

/// The words of a paragraph without code spans, link targets, digits and punctuation, marked so that it
/// never equals a plain text.
fn template(words: &str) -> String {
    let mut bare = String::from("\0");
    for (index, outside) in words.split('`').enumerate() {
        if index % 2 == 1 {
            continue;
        }
        let mut rest = outside;
        while let Some((before, link)) = rest.split_once("](") {
            bare.push_str(before);
            rest = link.split_once(')').map_or("", |(_, after)| after);
        }
        bare.push_str(rest);
    }
    bare.retain(|c| c.is_alphabetic() || c == '\0');
    bare
}

fn blocks(text: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut paragraph = String::new();
    let mut lines = text.lines();
    let end = |paragraph: &mut String, blocks: &mut Vec<Block>| {
        if !paragraph.trim().is_empty() {
            blocks.push(Block::Paragraph(paragraph.trim_end().to_owned()));
        }
        paragraph.clear();
    };
    while let Some(line) = lines.next() {
        let line = line.trim_end();
        let start = line.trim_start();
        if let Some(fence) = ["```", "~~~"].into_iter().find(|fence| start.starts_with(fence)) {
            end(&mut paragraph, &mut blocks);
            let mut code = String::from(line);
            for line in lines.by_ref() {
                code.push('\n');
                code.push_str(line.trim_end());
                if line.trim_start().starts_with(fence) {
                    break;
                }
            }
            let closed = code.lines().count() > 1
                && code.lines().last().is_some_and(|line| line.trim_start().starts_with(fence));
            if !closed {
                code.push('\n');
                code.push_str(fence);
            }
            blocks.push(Block::Code(code));
        } else if let Some(level) = heading_level(start) {
            end(&mut paragraph, &mut blocks);
            blocks.push(Block::Heading { level, text: start.to_owned() });
        } else if start.is_empty() {
            end(&mut paragraph, &mut blocks);
        } else if !is_noise(start) {
            paragraph.push_str(line);
            paragraph.push('\n');
        }
    }
    end(&mut paragraph, &mut blocks);
    blocks
}

/// Level of a Markdown heading.
fn heading_level(line: &str) -> Option<usize> {
    let level = line.bytes().take_while(|&byte| byte == b'#').count();
    (1..=6).contains(&level).then_some(level).filter(|_| line[level..].starts_with(' '))
}

/// Lines that no person reads: badges, images, link definitions, tags alone, lists of links, long codes.
fn is_noise(line: &str) -> bool {
    let definition = line.starts_with('[') && !line.starts_with("[^") && line.contains("]:");
    let badge = line.contains("[![") || (line.starts_with("![") && line.ends_with(')'));
    let tag = line.starts_with('<') && line.ends_with('>');
    let links = line.matches("](").count() >= 3 || line.matches("http").count() >= 3;
    let code = line.split_whitespace().any(|word| word.len() > 120 && !word.contains("://"));
    let rule = line.bytes().all(|byte| b"-=*_|: +".contains(&byte)) && line.len() > 3;
    definition || badge || tag || links || code || (rule && !line.contains('|'))
}

/// True if at least `percent` of the characters are letters or spaces and no line is endless.
fn is_text(body: &str, percent: usize) -> bool {
    let all = body.chars().count();
    let letters = body.chars().filter(|c| c.is_alphabetic() || c.is_whitespace()).count();
    letters * 100 >= all * percent && body.lines().all(|line| line.len() < 4000)
}

fn is_licence(body: &str) -> bool {
    const PHRASES: [&str; 12] = [
        "licensed under",
        "permission is hereby granted",
        "the software is provided",
        "without warranty of any kind",
        "unless you explicitly state otherwise",
        "unless required by applicable law",
        "redistribution and use in source",
        "all rights reserved",
        "http://www.apache.org/licenses",
        "license-mit",
        "license-apache",
        "copyright (c)",
    ];
    let lower = body.to_lowercase().split_whitespace().collect::<Vec<_>>().join(" ");
    PHRASES.iter().any(|phrase| lower.contains(phrase))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(text: &str) -> String {
        Cleaner::default().clean(&[text.to_owned()], usize::MAX)
    }

    #[test]
    fn noise_goes_and_prose_stays() {
        let text = "# Title\n\n[![Build](https://a/b.svg)](https://a)\n![logo](x.png)\n\n\
            <p align=\"center\">\n\nSome prose, on\ntwo lines.\n\n[name]: https://example.org\n\n\
            [a](b) | [c](d) | [e](f)\n\n## License\n\nLicensed under either of MIT or Apache.\n\n\
            ## Use\n\n```rust\nlet a = b;\n\nlet c = d;\n```\n";
        assert_eq!(
            clean(text),
            "# Title\n\nSome prose, on\ntwo lines.\n\n## Use\n\n```rust\nlet a = b;\n\nlet c = d;\n```\n"
        );
    }

    #[test]
    fn what_was_seen_is_dropped_in_later_documents() {
        let mut cleaner = Cleaner::default();
        let first = "One paragraph here.\n\nAnother one.".to_owned();
        let second = "One   paragraph\nhere.\n\nSomething new.".to_owned();
        assert_eq!(cleaner.clean(&[first], 1000), "One paragraph here.\n\nAnother one.\n");
        assert_eq!(cleaner.clean(&[second], 1000), "Something new.\n");
    }

    #[test]
    fn templates_are_cut_after_three() {
        let text: String = (0..9)
            .map(|i| format!("The `f{i}` class, see [docs](https://x/{i}) item {i}.\n\n"))
            .collect();
        assert_eq!(clean(&text).matches("class").count(), 3);
    }

    #[test]
    fn headings_need_something_under_them_in_their_section() {
        let mut cleaner = Cleaner::default();
        let sections = ["# Examples\n".to_owned(), "Text of the next item.".to_owned()];
        assert_eq!(cleaner.clean(&sections, 1000), "Text of the next item.\n");
        assert_eq!(clean("# A\n## B\n### C\n## D\nbody text"), "# A\n\n## D\n\nbody text\n");
        assert_eq!(clean("#hashtag is a paragraph"), "#hashtag is a paragraph\n");
    }

    #[test]
    fn data_is_not_text() {
        assert_eq!(clean("0x12, 0x34, 0x56, 0x78, 0x9a\n0x12, 0x34, 0x77"), "");
        assert_eq!(clean(&"QUJD".repeat(60)), "");
        assert_eq!(clean("```\n1 2 3 4 5 6\n7,8,9,10,11\n```"), "");
    }

    #[test]
    fn whole_blocks_up_to_the_room() {
        let text = "first paragraph\n\nsecond paragraph\n\nthird".to_owned();
        let cleaned = Cleaner::default().clean(&[text], 40);
        assert_eq!(cleaned, "first paragraph\n\nsecond paragraph\n");
    }

    #[test]
    fn unclosed_fences_are_closed() {
        assert_eq!(clean("```\nlet unclosed = yes;"), "```\nlet unclosed = yes;\n```\n");
        assert_eq!(clean("words\n```"), "words\n");
    }
}
