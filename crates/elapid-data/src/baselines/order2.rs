//! A byte model of order 2: the next byte given the two before it, from counts.
//!
//! Orders 2, 1 and 0 and the uniform distribution are interpolated by Witten and Bell's rule (IEEE
//! Transactions on Information Theory 37(4), 1991, method C): `p(x | c) = (n(c, x) + d(c) · p(x | c')) /
//! (n(c) + d(c))`, where `c'` is the context without its oldest byte, `n` counts and `d` is the number of
//! different bytes that followed.

type Counts = [u32; 256];
type Distribution = [f64; 256];

/// The trained model.
#[derive(Debug, Clone)]
pub struct Order2 {
    zero: Distribution,
    one: Vec<Distribution>,
    /// By `256 · older + newer`; a context that was never seen has none.
    two: Vec<Option<Box<Distribution>>>,
}

impl Order2 {
    /// Counts the texts; no context reaches from one to the next.
    pub fn train<'a>(texts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut zero: Counts = [0; 256];
        let mut one: Vec<Counts> = vec![[0; 256]; 256];
        let mut two: Vec<Option<Box<Counts>>> = vec![None; 1 << 16];
        let add = |counts: &mut Counts, byte: u8| {
            let count = &mut counts[usize::from(byte)];
            *count = count.saturating_add(1);
        };
        for text in texts {
            for (t, &byte) in text.iter().enumerate() {
                add(&mut zero, byte);
                if t >= 1 {
                    add(&mut one[usize::from(text[t - 1])], byte);
                }
                if t >= 2 {
                    let context = context(text[t - 2], text[t - 1]);
                    add(two[context].get_or_insert_with(|| Box::new([0; 256])), byte);
                }
            }
        }
        let zero = interpolate(&zero, &[1.0 / 256.0; 256]);
        let one: Vec<_> = one.iter().map(|counts| interpolate(counts, &zero)).collect();
        let two = two
            .iter()
            .enumerate()
            .map(|(context, counts)| {
                let counts = counts.as_ref()?;
                Some(Box::new(interpolate(counts, &one[context & 0xff])))
            })
            .collect();
        Self { zero, one, two }
    }

    /// The distribution of the byte after `before`, of which the last two bytes count.
    pub fn distribution(&self, before: &[u8]) -> &[f64; 256] {
        match *before {
            [] => &self.zero,
            [newer] => &self.one[usize::from(newer)],
            [.., older, newer] => match &self.two[context(older, newer)] {
                Some(distribution) => distribution,
                None => &self.one[usize::from(newer)],
            },
        }
    }

    /// Mean bits per byte over every byte of the texts but the first of each, which is what a language
    /// model is scored on; 0 if there is none.
    pub fn bits_per_byte<'a>(&self, texts: impl IntoIterator<Item = &'a [u8]>) -> f64 {
        let (mut bits, mut count) = (0.0, 0u64);
        for text in texts {
            for t in 1..text.len() {
                let before = &text[t.saturating_sub(2)..t];
                bits -= self.distribution(before)[usize::from(text[t])].log2();
                count += 1;
            }
        }
        bits / count.max(1) as f64
    }
}

fn context(older: u8, newer: u8) -> usize {
    usize::from(older) << 8 | usize::from(newer)
}

fn interpolate(counts: &Counts, lower: &Distribution) -> Distribution {
    let total: f64 = counts.iter().map(|&count| f64::from(count)).sum();
    let distinct = counts.iter().filter(|&&count| count > 0).count() as f64;
    if total == 0.0 {
        return *lower;
    }
    std::array::from_fn(|byte| {
        (f64::from(counts[byte]) + distinct * lower[byte]) / (total + distinct)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_distribution_sums_to_one() {
        let model = Order2::train([b"the theatre thesis".as_slice(), b"another".as_slice()]);
        for before in [b"".as_slice(), b"t", b"zz", b"th", b"xh", b"..the"] {
            let distribution = model.distribution(before);
            assert!((distribution.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            assert!(distribution.iter().all(|&p| p > 0.0));
        }
    }

    #[test]
    fn witten_bell_by_hand() {
        // "abab": after a always b (2 of 2), after b once a.
        let model = Order2::train([b"abab".as_slice()]);
        let zero_b = (2.0 + 2.0 / 256.0) / 6.0;
        let one_b = (2.0 + zero_b) / 3.0;
        let two_b = (1.0 + one_b) / 2.0;
        assert!((model.distribution(b"")[98] - zero_b).abs() < 1e-15);
        assert!((model.distribution(b"a")[98] - one_b).abs() < 1e-15);
        assert!((model.distribution(b"ba")[98] - two_b).abs() < 1e-15);
        let bits = -(one_b.log2() + model.distribution(b"ab")[97].log2()) / 2.0;
        assert!((model.bits_per_byte([b"aba".as_slice()]) - bits).abs() < 1e-12);
    }

    #[test]
    fn learns_order_two_and_nothing_means_eight_bits() {
        let text: Vec<u8> = b"abcacb".iter().copied().cycle().take(6000).collect();
        let model = Order2::train([text.as_slice()]);
        assert!(model.bits_per_byte([text.as_slice()]) < 0.01);
        let blank = Order2::train(std::iter::empty());
        assert_eq!(blank.bits_per_byte([b"any text".as_slice()]), 8.0);
        assert_eq!(blank.bits_per_byte([b"a".as_slice()]), 0.0);
    }
}
