import Glibc

/// Numbers a run can be given through the environment.
public enum TestEnvironment {
    /// The variable as a number; `nil` if it is not set or none.
    public static func number(_ name: String) -> UInt64? {
        // SAFETY: the text is copied at once, before anything could change the environment.
        guard let text = unsafe getenv(name) else { return nil }
        return unsafe UInt64(String(cString: text))
    }
}
