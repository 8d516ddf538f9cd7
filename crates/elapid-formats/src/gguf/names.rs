//! llama.cpp's names of tensors, and those of the Hugging Face layout.
//!
//! Mamba-2's table is here so that its files can be shown; a model of it is another matter.

/// The architecture's name in files.
pub const MAMBA: &str = "mamba";
/// The architecture's name in files.
pub const MAMBA2: &str = "mamba2";

const OUTSIDE: [(&str, &str); 4] = [
    ("token_embd.weight", "backbone.embeddings.weight"),
    ("output_norm.weight", "backbone.norm_f.weight"),
    ("output_norm.bias", "backbone.norm_f.bias"),
    ("output.weight", "lm_head.weight"),
];

/// Names within a layer that both architectures have.
const LAYER: [(&str, &str); 10] = [
    ("attn_norm.weight", "norm.weight"),
    ("attn_norm.bias", "norm.bias"),
    ("ssm_in.weight", "mixer.in_proj.weight"),
    ("ssm_in.bias", "mixer.in_proj.bias"),
    ("ssm_conv1d.weight", "mixer.conv1d.weight"),
    ("ssm_conv1d.bias", "mixer.conv1d.bias"),
    ("ssm_a", "mixer.A_log"),
    ("ssm_d", "mixer.D"),
    ("ssm_out.weight", "mixer.out_proj.weight"),
    ("ssm_out.bias", "mixer.out_proj.bias"),
];

const MAMBA_LAYER: [(&str, &str); 3] = [
    ("ssm_x.weight", "mixer.x_proj.weight"),
    ("ssm_dt.weight", "mixer.dt_proj.weight"),
    ("ssm_dt.bias", "mixer.dt_proj.bias"),
];

const MAMBA2_LAYER: [(&str, &str); 2] =
    [("ssm_dt.bias", "mixer.dt_bias"), ("ssm_norm.weight", "mixer.norm.weight")];

fn layer_names(
    architecture: &str,
) -> Option<impl Iterator<Item = &'static (&'static str, &'static str)>> {
    let own: &'static [_] = match architecture {
        MAMBA => &MAMBA_LAYER,
        MAMBA2 => &MAMBA2_LAYER,
        _ => return None,
    };
    Some(LAYER.iter().chain(own))
}

/// The Hugging Face name of a tensor of a file; none if there is no such tensor in that architecture.
pub fn to_hugging_face(architecture: &str, name: &str) -> Option<String> {
    let mut layer = layer_names(architecture)?;
    if let Some((_, own)) = OUTSIDE.iter().find(|(file, _)| *file == name) {
        return Some((*own).into());
    }
    let (index, rest) = split_layer(name, "blk.")?;
    let (_, own) = layer.find(|(file, _)| *file == rest)?;
    Some(format!("backbone.layers.{index}.{own}"))
}

/// The name in a file of a tensor of the Hugging Face layout.
pub fn from_hugging_face(architecture: &str, name: &str) -> Option<String> {
    let mut layer = layer_names(architecture)?;
    if let Some((file, _)) = OUTSIDE.iter().find(|(_, own)| *own == name) {
        return Some((*file).into());
    }
    let (index, rest) = split_layer(name, "backbone.layers.")?;
    let (file, _) = layer.find(|(_, own)| *own == rest)?;
    Some(format!("blk.{index}.{file}"))
}

/// The number behind a prefix, and what follows its dot.
pub(super) fn split_layer<'a>(name: &'a str, prefix: &str) -> Option<(usize, &'a str)> {
    let (index, rest) = name.strip_prefix(prefix)?.split_once('.')?;
    let number = index.parse::<usize>().ok()?;
    // "07" and "+7" would be another name for 7.
    (number.to_string() == index).then_some((number, rest))
}

#[cfg(test)]
mod tests {
    use elapid_models::{MambaConfig, NormKind, parameter_outlines};

    use super::*;

    #[test]
    fn every_parameter_has_a_name_there_and_back() {
        let base = MambaConfig { bias: true, tie_embeddings: false, ..MambaConfig::bytes(16, 12) };
        for config in [base.clone(), MambaConfig { norm: NormKind::Layer, ..base }] {
            for outline in parameter_outlines(&config) {
                let file = from_hugging_face(MAMBA, &outline.name).unwrap();
                assert_eq!(to_hugging_face(MAMBA, &file).as_deref(), Some(outline.name.as_str()));
            }
        }
        let of = |name| to_hugging_face(MAMBA2, name);
        assert_eq!(of("blk.3.ssm_norm.weight").unwrap(), "backbone.layers.3.mixer.norm.weight");
        assert_eq!(of("blk.3.ssm_dt.bias").unwrap(), "backbone.layers.3.mixer.dt_bias");
        for name in ["blk.03.ssm_d", "blk.+3.ssm_d", "blk.3.ssm_x.weight", "blk.x.ssm_d", "blk.3"] {
            assert_eq!(of(name), None, "{name}");
        }
        assert_eq!(to_hugging_face("llama", "token_embd.weight"), None);
    }
}
