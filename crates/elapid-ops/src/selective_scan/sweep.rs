//! The inner loops of the backward scan: one chunk of time, one vector of channels, a block of states.

use pulp::Simd;

use super::field::Field;
use super::tile::Coefficients;
use crate::simd::decay_constants;

/// The states and decays of a chunk, `states` from h before the first step on, and y if it is wanted.
#[inline(always)]
pub(super) fn recompute<
    S: Simd,
    F: Field,
    const NB: usize,
    const CLAMP: bool,
    const TOKEN: bool,
>(
    simd: S,
    (delta, delta_u): (&[f32], &[f32]),
    y: Option<&mut [f32]>,
    rates: &[f32],
    (states, decays): (&mut [f32], &mut [f32]),
    (b, c): (Coefficients, Coefficients),
) {
    let size = F::PARTS * S::F32_LANES;
    let (delta, _) = S::as_simd_f32s(delta);
    let (delta_u, _) = S::as_simd_f32s(delta_u);
    let steps = delta.len();
    assert!(states.len() >= (steps + 1) * NB * size && decays.len() >= steps * NB * size);
    assert!(rates.len() == NB * size);
    let constants = decay_constants(simd);
    let constants = std::hint::black_box(&constants);
    let mut h = [F::zero(simd); NB];
    for (i, h) in h.iter_mut().enumerate() {
        // SAFETY: the first NB numbers of `states`.
        *h = unsafe { F::load(simd, states.as_ptr().add(i * size)) };
    }
    let y = y.map(|y| S::as_mut_simd_f32s(y).0);
    let mut y = y.map(|y| y.iter_mut());
    for (t, (&delta, &delta_u)) in delta.iter().zip(delta_u).enumerate() {
        let mut factors = [F::zero(simd); NB];
        for (i, rate) in factors.iter_mut().enumerate() {
            // SAFETY: `rates` holds NB numbers.
            *rate = unsafe { F::load(simd, rates.as_ptr().add(i * size)) };
        }
        let factors = F::decays::<S, NB, CLAMP>(simd, constants, delta, factors);
        for (i, &decay) in factors.iter().enumerate() {
            let at = (t * NB + i) * size;
            // SAFETY: within the lengths asserted above; t and i are within the steps and block of b.
            unsafe {
                let input = F::scale(simd, delta_u, b.get::<S, F, TOKEN>(simd, t, i));
                h[i] = F::mul_add(simd, decay, h[i], input);
                F::store(simd, decays.as_mut_ptr().add(at), decay);
                F::store(simd, states.as_mut_ptr().add(at + NB * size), h[i]);
            }
        }
        if let Some(y) = y.as_mut().and_then(Iterator::next) {
            // Summed in a register: c might lie where y does, for all the compiler knows.
            let mut sum = *y;
            for (i, &h) in h.iter().enumerate() {
                // SAFETY: t and i are within the steps and block of c.
                sum = F::dot(simd, unsafe { c.get::<S, F, TOKEN>(simd, t, i) }, h, sum);
            }
            *y = sum;
        }
    }
}

/// What a block's gradients are made of besides rows.
pub(super) struct Forward<'a> {
    pub rates: &'a [f32],
    /// As [`recompute`] has made them.
    pub states: &'a [f32],
    pub decays: &'a [f32],
    pub b: Coefficients,
    pub c: Coefficients,
}

/// Sums of dB and dC over channels, lane by lane: rows that are so far apart, 0 for one row in all.
pub(super) struct Sums<'a> {
    pub b: (&'a mut [f32], usize),
    pub c: (&'a mut [f32], usize),
}

/// The reverse sweep over a chunk for `NB` states of one vector of channels.
#[inline(always)]
pub(super) fn reverse<S: Simd, F: Field, const NB: usize, const TOKEN: bool>(
    simd: S,
    (delta, delta_u, dy): (&[f32], &[f32], &[f32]),
    (by_input, by_decay): (&mut [f32], &mut [f32]),
    forward: Forward<'_>,
    sums: Sums<'_>,
    carry: &mut [f32],
    da: &mut [F::V<S>; NB],
) {
    let Forward { rates, states, decays, b, c } = forward;
    let Sums { b: (sum_b, step_b), c: (sum_c, step_c) } = sums;
    let size = F::PARTS * S::F32_LANES;
    let (delta, _) = S::as_simd_f32s(delta);
    let (delta_u, _) = S::as_simd_f32s(delta_u);
    let (dy, _) = S::as_simd_f32s(dy);
    let (by_input, _) = S::as_mut_simd_f32s(by_input);
    let (by_decay, _) = S::as_mut_simd_f32s(by_decay);
    let steps = delta.len();
    assert!(delta_u.len() == steps && dy.len() == steps);
    assert!(by_input.len() == steps && by_decay.len() == steps);
    assert!(states.len() >= (steps + 1) * NB * size && decays.len() >= steps * NB * size);
    assert!(sum_b.len() >= steps * NB * size && sum_c.len() >= steps * NB * size);
    assert!(step_b <= NB * size && step_c <= NB * size);
    assert!(rates.len() == NB * size && carry.len() == NB * size);
    let mut g = [F::zero(simd); NB];
    for (i, g) in g.iter_mut().enumerate() {
        // SAFETY: carry holds NB numbers.
        *g = unsafe { F::load(simd, carry.as_ptr().add(i * size)) };
    }
    for t in (0..steps).rev() {
        let (delta, delta_u, dy) = (delta[t], delta_u[t], dy[t]);
        let (mut input, mut through) = (by_input[t], by_decay[t]);
        for i in 0..NB {
            let at = (t * NB + i) * size;
            // SAFETY: within the lengths asserted above; t and i are within the steps and block of b and c.
            unsafe {
                let gradient = F::scale_conj_add(simd, dy, c.get::<S, F, TOKEN>(simd, t, i), g[i]);
                let decay = F::load(simd, decays.as_ptr().add(at));
                let before = F::load(simd, states.as_ptr().add(at));
                let h = F::load(simd, states.as_ptr().add(at + NB * size));
                let to_b = sum_b.as_mut_ptr().add(t * step_b + i * size);
                let to_c = sum_c.as_mut_ptr().add(t * step_c + i * size);
                F::store(simd, to_c, F::scale_conj_add(simd, dy, h, F::load(simd, to_c)));
                F::store(simd, to_b, F::scale_add(simd, delta_u, gradient, F::load(simd, to_b)));
                input = F::conj_dot(simd, b.get::<S, F, TOKEN>(simd, t, i), gradient, input);
                g[i] = F::conj_mul(simd, decay, gradient);
                // conj(w) G with w = a h_{t-1}, as conj(h_{t-1}) (conj(a) G), which is needed anyway.
                let product = F::conj_mul(simd, before, g[i]);
                da[i] = F::scale_add(simd, delta, product, da[i]);
                let rate = F::load(simd, rates.as_ptr().add(i * size));
                through = F::conj_dot(simd, rate, product, through);
            }
        }
        by_input[t] = input;
        by_decay[t] = through;
    }
    for (i, &g) in g.iter().enumerate() {
        // SAFETY: carry holds NB numbers.
        unsafe { F::store(simd, carry.as_mut_ptr().add(i * size), g) };
    }
}
