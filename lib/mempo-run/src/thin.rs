//! Giving back the disk that old checkpoints take, without forgetting that they were there.

use std::path::Path;

use crate::{Manifest, check, durable, lock::Lock};

/// Removes files of a finished directory and marks them so in its manifest; returns the bytes that were freed.
///
/// The directory stays finished: stages that read it once need not run again, `verify` compares what is left, and a
/// stage that would need what is gone says so. Stopped halfway, the same call goes on.
pub fn thin(dir: &Path, is_unneeded: impl Fn(&str) -> bool) -> anyhow::Result<u64> {
    let failed = |error: std::io::Error| durable::failed(dir, dir, error.into());
    let _lock = Lock::acquire(dir)?;
    let mut manifest = crate::finished(dir)?;
    let mut marked = false;
    for file in manifest.files.iter_mut().filter(|file| !file.removed && is_unneeded(&file.path)) {
        (file.removed, marked) = (true, true);
    }
    if marked {
        manifest.write(dir)?;
    }
    let mut freed = 0;
    for file in manifest.files.iter().filter(|file| file.removed) {
        let path = check::inside(dir, file)?;
        match fs_err::remove_file(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            result => {
                result.map_err(failed)?;
                freed += file.size;
            }
        }
    }
    Ok(freed)
}

impl Manifest {
    /// The first of some files that was removed, if one was.
    pub fn removed(&self, is_meant: impl Fn(&str) -> bool) -> Option<&str> {
        self.files.iter().find(|file| file.removed && is_meant(&file.path)).map(|file| file.path.as_str())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::{Input, Stage, StageArgs, exit_code, thin, verify};

    #[test]
    fn what_was_removed_is_known_and_no_input() {
        let folder = tempfile::tempdir().unwrap();
        let (model, next) = (folder.path().join("model"), folder.path().join("next"));
        let open = |out: &std::path::Path, inputs: &[&Input]| {
            let args = StageArgs { out: out.to_owned(), seed: 0, restart: false, shard: None };
            Stage::open("mempo-test", "train", &args, &json!({}), inputs)
        };
        let stage = open(&model, &[]).unwrap().unwrap();
        for (name, text) in
            [("config.json", "{}"), ("model.safetensors", "weights"), ("trainer/a.safetensors", "state")]
        {
            stage.write_file(name, |sink| Ok(std::io::Write::write_all(sink, text.as_bytes())?)).unwrap();
        }
        stage.finish(&[], json!({})).unwrap();
        let whole = Input::model("model", &model).unwrap();
        open(&next, &[&whole]).unwrap().unwrap().finish(&[], json!({})).unwrap();

        let weights = |path: &str| path.ends_with(".safetensors");
        assert_eq!(thin(&model, |path| path.starts_with("trainer/")).unwrap(), 5);
        assert!(open(&folder.path().join("other"), &[&Input::model("model", &model).unwrap()]).unwrap().is_some());
        assert_eq!(thin(&model, weights).unwrap(), 7);
        assert_eq!(thin(&model, weights).unwrap(), 0);
        verify(&model).unwrap();
        // Stopped after the manifest was written: the file is still there.
        fs_err::write(model.join("model.safetensors"), "weights").unwrap();
        let hollow = Input::model("model", &model).unwrap();
        assert_eq!(hollow.digest(), whole.digest());
        assert_eq!(thin(&model, weights).unwrap(), 7);

        let hollow = Input::model("model", &model).unwrap();
        assert_eq!(hollow.digest(), whole.digest());
        assert!(open(&model, &[]).unwrap().is_none(), "still finished");
        assert!(open(&next, &[&hollow]).unwrap().is_none(), "still finished");
        let error = open(&folder.path().join("new"), &[&hollow]).unwrap_err();
        assert_eq!(exit_code(&error), 4);
        assert!(format!("{error:#}").contains("model.safetensors was removed"), "{error:#}");
        assert!(!folder.path().join("new").exists());
    }
}
